"""The layers under the names, arguments and conventions of other systems."""
