"""Training frameworks with which jddist works: one module for each, imported on demand."""
