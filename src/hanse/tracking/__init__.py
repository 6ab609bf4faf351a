"""Where a run's values go: TensorBoard, MLflow, Weights & Biases. Each is a receiver, as `hanse.server.track` has it."""
