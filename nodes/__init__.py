"""The pack's ComfyUI extension: which file holds which nodes."""

import importlib
import logging

from comfy_api.latest import ComfyExtension, io

_log = logging.getLogger(__name__)

NODES = {
    "linearize": ("LinVideoLinearize",),
    "transfer_settings": ("LinVideoTransferSettings",),
    "few_step": ("LinVideoFewStepSampler", "LinVideoFewStepSigmas"),
    "file_nodes": ("LinVideoSave", "LinVideoLoad", "LinVideoShowFile"),
    "softmax_backend": ("LinVideoSoftmaxBackend",),
    "export_prompts": ("LinVideoExportPrompts",),
    "demo": ("LinVideoDemo", "LinVideoDemoDecode"),
}


class LinVideoExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes; a file that cannot be loaded costs its own nodes only."""
        from .model_folder import register_folder

        register_folder()
        found = []
        for file, names in NODES.items():
            try:
                module = importlib.import_module(f".{file}", __name__)
                found += [getattr(module, name) for name in names]
            except Exception:
                _log.exception("LinVideo: the nodes %s could not be loaded", ", ".join(names))
        return found
