"""Upload of a directory to the Hugging Face Hub."""

from pathlib import Path

from rlhf_jax.types import RlhfError


def upload_directory(directory: Path, repository: str, *, private: bool) -> str:
    """Upload a directory as one commit to a model repository, which is created if it does not exist.

    The address and the token are those of `huggingface_hub`: HF_ENDPOINT, and HF_TOKEN or `hf auth login`.

    Args: repository is OWNER/NAME; private applies to a new repository.

    Returns: the address of the commit.

    Raises: RlhfError if the Hub refuses or cannot be reached.
    """
    import huggingface_hub  # takes a second; only needed for uploads

    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository, folder_path=directory, commit_message=f"Upload {directory.name} from rlhf_jax"
        )
    except Exception as error:  # from the HTTP client, the hub client or the file system
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RlhfError(f"{directory} cannot be uploaded to {repository}: {reason}. The directory is kept") from error
    return commit.commit_url
