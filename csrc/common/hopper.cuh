// What a product on Hopper is made of: one warp has tiles copied to shared memory, warpgroups multiply them there.
#pragma once
#include "common/barriers.cuh"
#include "common/cluster.cuh"
#include "common/memory.cuh"
#include "common/tensor_copies.cuh"
#include "common/warpgroup.cuh"
