"""Wire protocols that robots' clients already speak, over one policy: one file each, thin over ``session.Session``."""
