. ../../TEMPLATE/asr1/path.sh
