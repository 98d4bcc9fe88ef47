"""An app with tasks, for the tests."""
