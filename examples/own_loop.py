"""Your own training loop with torchslice's objective: train the sub-models that will be cut."""

import torch

import torchslice as ts


def main() -> None:
    """Train as usual for some epochs, then sub-tasks: each step on a few classes and their neurons alone."""
    torch.manual_seed(0)
    task = ts.data.load("digits")
    model = ts.models.create("convnet", channels=1, width=0.5)
    ts.fit(model, task, ts.Training(epochs=4, batch_size=32))
    neurons = ts.find_neurons(model, task.example, classes=task.classes)
    slices = ts.semantic.class_slices(neurons, task, strategy=ts.semantic.Budget(0.2))

    objective = ts.subtasks.objective(neurons, slices)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    model.train()
    for step in range(160):
        drawn = torch.randperm(10)[: objective.sizes[step % len(objective.sizes)]]
        rows = torch.isin(task.train.labels, drawn).nonzero().flatten()
        rows = rows[torch.randperm(len(rows))[:32]]
        inputs = next(iter(task.train.read([rows])))
        loss, _, _ = objective(model, inputs, task.train.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    pair = ts.reuse(neurons, task, slices, classes=["3", "8"], tune=False)
    print(f"the whole network, all classes:    {ts.accuracy(model, task)}")
    print(f"the sub-model of 3 and 8, as cut:  {ts.accuracy(pair.model, task.restrict(pair.classes))}")


if __name__ == "__main__":
    main()
