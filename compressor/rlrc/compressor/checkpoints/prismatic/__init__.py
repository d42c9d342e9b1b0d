"""The folders of OpenVLA and OpenVLA-OFT."""
