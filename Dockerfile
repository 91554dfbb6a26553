# Image for launch/gke_jobset.yaml, launch/gke_jobset_gpu.yaml and xpk. Arguments of the container are flags of
# `python -m ilm_jax.main`.
#
#   docker build --tag REGION-docker.pkg.dev/PROJECT/ilm/ilm_jax:latest .                                # TPU
#   docker build --build-arg EXTRAS=cuda,gcs --tag REGION-docker.pkg.dev/PROJECT/ilm/ilm_jax:cuda .      # GPU
#
# A GPU machine needs only the driver: CUDA is installed with the Python packages.
# Last real build: never.
FROM python:3.12-slim
ARG EXTRAS=tpu,gcs
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /ilm_jax
# Install the dependencies in a layer of their own, which Docker can reuse after changes of the code.
COPY pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir ".[${EXTRAS}]" && pip uninstall --yes ilm_jax
# The copy includes .git, so that a run can record its commit in run.json.
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .
ENTRYPOINT ["python", "-m", "ilm_jax.main"]
