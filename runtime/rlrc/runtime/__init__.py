"""The robot side: observation in, actions out, at a fixed rate. Never imports torch, transformers or onnx."""
