"""Export for ONNX Runtime: its operators and precisions."""
