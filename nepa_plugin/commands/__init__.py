"""The commands: one module each, with a ``main`` that ``nepa NAME`` and ``tools/`` call."""
