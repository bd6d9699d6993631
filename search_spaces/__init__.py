"""Search spaces that ship with the package, one YAML file each; the form is described in docs/search-spaces.md."""
