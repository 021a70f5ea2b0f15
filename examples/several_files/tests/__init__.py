"""The tests of the app, against a real server."""
