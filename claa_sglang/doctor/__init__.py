"""`claa-sglang doctor`: would a server start here with these flags, and if not, with which."""
