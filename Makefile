# Short names for what the scripts do; each says more in its own help.

.PHONY: help environment lint quick test wheel site demo image image-cpu

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile

environment: ## the environment of the tests and the demo, in .venv
	bash launchers/environment.sh

lint: environment ## ruff and mypy
	. .venv/bin/activate && ruff check . && ruff format --check . && mypy beit3_dist

quick: ## the fast tests, five minutes
	bash tests/run.sh --quick

test: ## all tests
	bash tests/run.sh

wheel: ## dist/*.whl
	python3 -m pip wheel --no-deps --wheel-dir dist .

site: environment ## the documentation, in site/
	. .venv/bin/activate && mkdocs build --strict

demo: ## a small model on real data, from start to end
	bash launchers/demo.sh

image: ## a Docker image for NVIDIA GPUs
	docker build -f launchers/containers/Dockerfile --target cuda -t beit3 .

image-cpu: ## a Docker image for CPUs alone
	docker build -f launchers/containers/Dockerfile --target cpu -t beit3:cpu .
