"""Support for models of other libraries."""
