"""make_cuda_job.py DIRECTORY: a tiny model, calibration tokens and a job on the GPU, to be carried to a machine that has one.

`tools/gpu_pipeline.sh PROGRAMS DIRECTORY checkpoints` makes checkpoints of 2, 3, 4 and 8 bits of it there;
QUANTMILL_CUDA_CHECKPOINTS=DIRECTORY lets test_gptqmodel.py judge them here.
"""

import sys
from pathlib import Path

from conftest import make_model, random_sequences, write_job, write_store

directory = Path(sys.argv[1])
model = directory / "model"
make_model(model, "Llama")
store = write_store(directory / "calib.h5", random_sequences(16, 128, seed=1), model)
job = write_job(directory / "job.yaml", Path("model"), Path("calib.h5"), Path("out"), {"bits": 4, "group_size": 64}, format="gptq")
job.write_text(job.read_text().replace("backend: cpu", "backend: cuda"))
