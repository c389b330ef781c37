"""The built-in stages: one file, one stage, named as in YAML. They import from `gateway` alone."""
