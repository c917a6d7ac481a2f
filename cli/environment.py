"""The environment variables that adaptlib reads, itself or through the libraries it calls."""

from typing import Final

VARIABLES: Final = {
    "ADAPTLIB_LIBRARY": "the library, where --library does not say",
    "ADAPTLIB_NO_CONFIG": "anything: leave out the files of settings, as --no-config does",
    "ADAPTLIB_DEBUG": "anything: a traceback for an error, and the warnings of other packages",
    "NO_COLOR": "anything: no colours, whatever else is said",
    "FORCE_COLOR": "anything but 0: colours, also in a pipe; --color and the setting go before it",
    "CLICOLOR_FORCE": "the same as FORCE_COLOR",
    "TERM": "dumb: a terminal without colours",
    "COLUMNS": "how wide tables are; else as wide as the terminal, or 80",
    "OMP_NUM_THREADS": "how many threads PyTorch and NumPy use",
    "XDG_CONFIG_HOME": "where the user's settings are, in adaptlib/config.toml; else ~/.config",
    "XDG_DATA_HOME": "where the user's library is, in adaptlib/library; else ~/.local/share",
    "HF_HOME": "where models from the Hugging Face hub are kept; else ~/.cache/huggingface",
    "HF_HUB_CACHE": "where the hub's models alone are kept; else HF_HOME/hub",
    "HF_HUB_OFFLINE": "1: no network; base models come from the cache alone",
    "HF_ENDPOINT": "another hub than https://huggingface.co",
    "HF_TOKEN": "the token for models on the hub that are not for everybody",
}
SECRET: Final = ("HF_TOKEN",)
