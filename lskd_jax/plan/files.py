"""The files of a config that a step's shapes depend on, where they are here."""
from pathlib import Path


def model_config(config) -> Path | None:
  """config.json of `init.model`; None if that is not here."""
  path = Path(config.init.model, "config.json")
  return path if config.init.model and path.exists() else None


def tokenizer_folder(config) -> Path | None:
  """The folder of the config's tokenizer, or of that of `init.model`; None if it is not here."""
  model = model_config(config)
  folders = (config.data.tokenizer, model and model.parent / "tokenizer")
  return next((Path(folder) for folder in folders if folder and Path(folder).is_dir()), None)
