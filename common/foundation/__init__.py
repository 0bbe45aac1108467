"""What everything stands on: configs, runs and manifests, assets, statistics, devices, plots."""
