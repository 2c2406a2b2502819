"""An embedded model server that speaks TF Serving's protocols; imports neither tfx nor trainer.

| module        | holds                                                                     |
|---------------|---------------------------------------------------------------------------|
| `__main__`    | the command                                                               |
| `options`     | its flags, which are tensorflow_model_server's where that has them        |
| `config`      | what the configuration files ask for                                      |
| `protos`      | those of their protos that the tensorflow-serving-api package leaves out  |
| `errors`      | what a request can be answered with instead of a prediction               |
| `tensors`     | TensorProto to NumPy and back, trusting no field                          |
| `images`      | sizes of encoded images, read before anything decodes them                |
| `servable`    | one loaded version: session, signatures, warm-up                          |
| `versions`    | which versions should be there, and their states                          |
| `manager`     | watches base paths; loads, switches, drains and unloads                   |
| `batching`    | one run for several requests                                              |
| `predictor`   | request to response, whatever protocol it came by                         |
| `admission`   | how many requests are worked on at a time                                 |
| `grpc_server` | TF Serving's services, health and reflection                              |
| `rest`        | TF Serving's HTTP paths                                                   |
| `json_tensors`| their forms of tensors                                                    |
| `metrics`     | Prometheus, under TF Serving's names                                      |
| `lifecycle`   | puts these together, and takes them apart in order                        |
"""
