"""PyTorch: functions and modules of recurrences on its tensors."""
