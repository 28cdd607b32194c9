"""Training with learned masks: the weight of the model is a function of trained tensors."""
