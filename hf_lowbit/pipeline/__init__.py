"""The road from a checkpoint to a quantized one: calibration data, resumable work, reports."""
