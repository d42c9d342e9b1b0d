"""The robot side: observation in, actions out, at a fixed rate. Never imports torch, transformers or onnx."""

from rlrc.libraries import keep_local

keep_local()
