"""Which neurons experts keep, and the layers made of them: the choice, its budget, the tensors."""
