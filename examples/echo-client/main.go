// echo-client asks the upstream called "backend" once and prints the answer.
//
// BACKEND_ADDR is the address of its own sidecar's listener, such as localhost:21000.
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
)

func main() {
	backend := os.Getenv("BACKEND_ADDR")
	if backend == "" {
		log.Fatal("BACKEND_ADDR is not set: start me by 'lictor connect ... -- echo-client', or export it")
	}
	response, err := http.Get("http://" + backend)
	if err != nil {
		log.Fatalf("the call to %s failed: %v", backend, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		log.Fatalf("the answer from %s broke off: %v", backend, err)
	}
	if response.StatusCode != http.StatusOK {
		log.Fatalf("%s refused: %s: %s", backend, response.Status, body)
	}
	fmt.Printf("Client received: %s\n", body)
}
