"""Where a run's metrics go: TensorBoard, MLflow, Weights & Biases. Each is a function that writes what a run folder tells."""
