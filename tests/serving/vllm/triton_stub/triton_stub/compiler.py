"""Nothing is ever compiled."""

from typing import Any

from triton.backends.compiler import BaseBackend


class CPUBackend(BaseBackend):
    @staticmethod
    def supports_target(target: Any) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "cpu"

    def parse_options(self, options: Any) -> Any:
        raise NotImplementedError

    def add_stages(self, *arguments: Any) -> None:
        raise NotImplementedError

    def load_dialects(self, context: Any) -> None:
        """None to load."""

    def get_module_map(self) -> dict[str, Any]:
        return {}
