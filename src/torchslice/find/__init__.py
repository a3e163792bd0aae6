"""Find slices: with gates (MwT), from contributions (NeuSemSlice), or by training the sub-models that will be cut."""
