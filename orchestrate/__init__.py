"""The platform: stage graphs on Ray Train, searches by Ray Tune and Optuna, records in MLflow."""
