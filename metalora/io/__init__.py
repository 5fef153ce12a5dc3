"""Adapters as folders that the package ``peft`` reads and writes; needs ``peft`` when called.

    export_peft(model, folder)     the retrained base, and a PEFT adapter folder per task
    import_peft(model, folders)    PEFT adapter folders as the tasks of an adapted model

Tensors are safetensors in both directions; nothing is ever unpickled.
"""

from metalora.io.export import export_peft
from metalora.io.folder import PeftFolderError
from metalora.io.load import import_peft

__all__ = ["PeftFolderError", "export_peft", "import_peft"]
