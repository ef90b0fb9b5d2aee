"""What the scripts share: reading route logs, metrics, plots, validation, patching."""
