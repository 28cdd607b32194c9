"""`python -m hf_sparse` is `hf-sparse`."""

from .cli import main


if __name__ == "__main__":
    main()
