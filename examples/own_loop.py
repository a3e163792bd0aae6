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
    rankings = ts.subtasks.rank(neurons, task)

    objective, generator = ts.subtasks.objective(neurons, rankings), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    model.train()
    for _ in range(160):
        step = objective.draw(generator)
        rows = torch.isin(task.train.labels, torch.tensor(step.classes)).nonzero().flatten()
        rows = rows[torch.randperm(len(rows))[:32]]
        inputs = next(iter(task.train.read([rows])))
        loss, _, _ = step(model, inputs, task.train.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    pair = ts.reuse(neurons, task, rankings, classes=["3", "8"], mac_retention=0.4, tune=False)
    print(f"the whole network, all classes:    {ts.accuracy(model, task)}")
    print(f"the sub-model of 3 and 8, as cut:  {ts.accuracy(pair.model, task.restrict(pair.classes))}")


if __name__ == "__main__":
    main()
