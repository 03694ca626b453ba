"""How a process of SGLang becomes one that serves CLAA, or does not start; imports nothing by itself."""
