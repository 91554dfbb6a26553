# The image that launch/gke_jobset.yaml and xpk run; arguments of the container are flags of ilm_jax.main:
#
#   docker build --tag REGION-docker.pkg.dev/PROJECT/ilm/ilm_jax:latest .
#   docker build --build-arg EXTRAS=cuda,gcs --tag REGION-docker.pkg.dev/PROJECT/ilm/ilm_jax:cuda .
#
# A GPU host needs its driver only: CUDA comes with the packages.
# Last really built: never.
FROM python:3.12-slim
ARG EXTRAS=tpu,gcs
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /ilm_jax
# The packages first: a change of the code leaves this layer as it is.
COPY pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir ".[${EXTRAS}]" && pip uninstall --yes ilm_jax
# With .git: run.json says which commit ran.
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .
ENTRYPOINT ["python", "-m", "ilm_jax.main"]
