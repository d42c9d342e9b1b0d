"""Export for llama.cpp: a decoder's blocks as a GGUF file."""
