"""`claa-sglang verify`: what is claimed of a server with CLAA, tried on a live one over HTTP."""
