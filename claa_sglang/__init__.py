"""CLAA for SGLang: after the prune layer, only the prompt tokens that matter go on.

SGLang finds the plugin through its entry point group; nothing here is imported without `--enable-claa`
except `claa_sglang.plugin`. The command line is `claa_sglang.cli`.
"""

__version__ = "0.2.0"
