"""The layers with the names, arguments and conventions of other libraries."""
