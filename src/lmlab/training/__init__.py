"""The loop: Lightning modules, data module, callbacks, checkpoints. The only package that imports Lightning."""
