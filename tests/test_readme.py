"""The README's library example runs as it stands."""

import torch

from helpers import ROOT


def test_readme_library_example(tmp_path, monkeypatch):
    """The README's Python block, run as it stands but for the model's pretrained weights."""
    import timm

    blocks = (ROOT / "README.md").read_text().split("```python")[1:]
    code = next(b for b in blocks if "recombine.merge" in b).split("```")[0].replace("pretrained=True", "img_size=32")
    assert "recombine.apply" in code and "recombine.merge" in code
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 32, 32, generator=g), torch.randint(10, (4,), generator=g)) for _ in range(3)]
    scope = {"loader": batches, "timm": timm, "torch": torch}
    exec(code, scope)
    assert type(scope["model"]).__name__ == "VisionTransformer" and not hasattr(scope["model"], "recombined")
    assert (tmp_path / "cersa.safetensors").exists()
