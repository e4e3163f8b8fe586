// Stands in for the CUDA toolkit's header where none is installed: TensorRT's headers need these two handles only.
// The build puts this folder last, so a real toolkit wins.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
