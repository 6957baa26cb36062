"""Power loss: a disk that forgets what was not synced, and what a store on it keeps."""
