"""ONNX Runtime: its operators, its precisions."""
