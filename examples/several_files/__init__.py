"""An app in several files: to-do lists that all clients see.

Run it from the folder above, and connect with the header ``Authorization: Bearer ada``:

    uvicorn --factory several_files.app:create_app
    python -m pytest several_files
"""
