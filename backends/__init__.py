"""The adapters: one file a quantization library, found by file name. See CONTRIBUTING.md."""
