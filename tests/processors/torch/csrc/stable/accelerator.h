// Stands in for torch's header of this name, of which only CUDA code needs anything.
#pragma once
