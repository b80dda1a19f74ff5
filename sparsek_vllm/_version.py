__version__ = "0.1.0"

# What messages tell to install: as in pyproject.toml.
VLLM = "vllm>=0.26,<=0.33.0"
XFORMERS = "xformers>=0.0.33.post2,<=0.0.35"
OPENAI = "openai>=1.99"
