"""The pack's ComfyUI extension. It registers no node yet: the method is headless so far."""

from comfy_api.latest import ComfyExtension, io


class LinVideoExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return []
